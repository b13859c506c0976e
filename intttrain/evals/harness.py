"""A trained model for lm-evaluation-harness (``lm_eval``, the ``harness`` extra), whose tasks then run as they are.

Every request is a document of its own: its state starts empty, and the update stays on while the context is read.
``lm_eval`` is imported when it is needed.

Letters: B rows of one call, T tokens, P tokens that were read (all T).
"""

from __future__ import annotations

import collections
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from intttrain import ttt
from intttrain.config import ModelConfig
from intttrain.data import Tokenizer
from intttrain.evals.completion import Completer
from intttrain.evals.conditions import Condition
from intttrain.layout.sharding import constrain, using_mesh
from intttrain.model import Generator, Params, Reading, Sampling, bind, piece_tokens, read_documents

MODEL_NAME = "intttrain"
SAMPLING_OPTIONS = {"do_sample", "max_gen_toks", "temperature", "top_k", "top_p", "until"}


class Respondent:
    """Answers the requests of a harness.

    Args:
      condition: the model and how it reads.
      tokenizer: of the model.
      rows: B, requests that are answered at the same time.
      report: receives progress lines.
      mesh: rows are cut over ``data`` and ``fsdp``.
    """

    def __init__(
        self,
        condition: Condition,
        tokenizer: Tokenizer,
        *,
        rows: int,
        report: Callable[[str], None],
        mesh: jax.sharding.Mesh | None = None,
    ) -> None:
        self.condition, self.tokenizer, self.rows, self.mesh = condition, tokenizer, rows, mesh
        self._report = report

        def make_generator(max_tokens: int) -> Generator:
            return condition.make_generator(rows=rows, max_tokens=max_tokens, mesh=mesh)

        self._completer = Completer(make_generator, tokenizer, empty=[tokenizer.end_of_document])

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
        """Returns the log-likelihood (nats) of every continuation, and whether greedy decoding would write it.

        Nothing is cut off, and each document is read as a whole. The first token of a document is not predicted, so it
        counts nothing: a continuation without context has to follow the end of a document. No continuation at all is
        certain: 0, True.

        Args:
          pairs: token ids of context and continuation.
        """
        documents = [np.asarray([*context, *continuation], np.int32) for context, continuation in pairs]
        by_length = collections.defaultdict(list)
        for number, document in enumerate(documents):
            by_length[padded_length(len(document), self.condition.model)].append(number)
        scores = [(0.0, True)] * len(pairs)
        for tokens in sorted(by_length, reverse=True):  # what does not fit into memory fails first
            self._report(f"scores: {len(by_length[tokens])} documents of up to {tokens} tokens")
            for at in range(0, len(by_length[tokens]), self.rows):
                numbers = by_length[tokens][at : at + self.rows]
                tokens_BT = np.zeros((self.rows, tokens), np.int32)
                start_B, length_B = np.zeros((2, self.rows), np.int32)
                for row, number in enumerate(numbers):
                    tokens_BT[row, : len(documents[number])] = documents[number]
                    start_B[row], length_B[row] = len(pairs[number][0]), len(documents[number])
                found_B = _score(
                    self.condition.model, self.mesh, self.condition.gate, self.condition.params, tokens_BT, start_B,
                    length_B, jnp.float32(self.condition.eta), jax.tree.map(jnp.asarray, self.condition.settings),
                )  # fmt: skip
                for number, nll, greedy in zip(numbers, *map(np.asarray, found_B), strict=False):
                    scores[number] = (-float(nll), bool(greedy))
        return scores

    def complete(self, prompts: Sequence[str], options: Sequence[Mapping[str, Any]]) -> list[str]:
        """Returns the continuation of every prompt, up to the first of its stops or the end of the document.

        Args:
          prompts: text; one without a token starts after the end of a document.
          options: of each prompt, the generation keywords of the harness in their normal form.
        """
        texts = [""] * len(prompts)
        alike = collections.defaultdict(list)
        for number, keywords in enumerate(options):
            alike[json.dumps(keywords, sort_keys=True)].append(number)
        for numbers in alike.values():
            keywords = options[numbers[0]]
            if unknown := sorted(set(keywords) - SAMPLING_OPTIONS):
                self._report(f"note: generation keywords without meaning here are not used: {', '.join(unknown)}")
            self._report(f"continuations: {len(numbers)} of up to {keywords['max_gen_toks']} tokens")
            temperature = float(keywords.get("temperature", 0.0)) if keywords["do_sample"] else 0.0
            top_k, top_p = keywords.get("top_k"), keywords.get("top_p")  # a task may write null for all tokens
            sampling = Sampling(temperature, int(top_k or 0), 1.0 if top_p is None else float(top_p))
            found = self._completer(
                [prompts[number] for number in numbers], max_new_tokens=keywords["max_gen_toks"], sampling=sampling,
                stop=[mark for mark in keywords["until"] if mark],
            )  # fmt: skip
            for at, text in found:
                texts[numbers[at]] = text
        return texts


def padded_length(tokens: int, model: ModelConfig) -> int:
    """Returns what a document is padded to, 1 to 8, 10, 12, 14, 16, 20, ... chunks: few compiled programs serve all."""
    piece = piece_tokens(model)
    pieces = max(1, -(-tokens // piece))
    step = max(1, (1 << (pieces - 1).bit_length()) // 8)  # a quarter of the power of two below
    return piece * -(-pieces // step) * step


def register_model(load: Callable[..., Respondent]) -> None:
    """Makes ``--model intttrain`` known to ``lm_eval``.

    Args:
      load: called with the model arguments of the harness by name, ``batch_size`` among them.
    """
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs

    class IntttrainLM(TemplateLM):
        def __init__(self, device: str | None = None, max_batch_size: int | None = None, **arguments: Any) -> None:
            super().__init__()  # the harness always names a device, of PyTorch
            self.respondent = load(**arguments)

        @property
        def eot_token_id(self) -> int:
            return self.respondent.tokenizer.end_of_document

        @property
        def tokenizer_name(self) -> str:
            return self.respondent.tokenizer.fingerprint

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            return self.respondent.tokenizer.encode(string).tolist()

        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            # lm_eval looks at the first token of a continuation without context, so there has to be one.
            is_nothing = [not context and not self.tok_encode(wanted) for context, wanted in (r.args for r in requests)]
            asked = [request for request, nothing in zip(requests, is_nothing, strict=True) if not nothing]
            found = iter(super().loglikelihood(asked, disable_tqdm=disable_tqdm))
            return [(0.0, True) if nothing else next(found) for nothing in is_nothing]

        def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
            # A context of nothing but spaces is given to the continuation.
            return self.respondent.score([(context or [self.eot_token_id], wanted) for _, context, wanted in requests])

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            texts = [self.tok_encode(request.args[0]) for request in requests]
            return [found for found, _ in self.respondent.score([([self.eot_token_id], ids) for ids in texts])]

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            options = [normalize_gen_kwargs(request.args[1]) for request in requests]
            return self.respondent.complete([request.args[0] for request in requests], options)

    register_model(MODEL_NAME)(IntttrainLM)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _score(
    model: ModelConfig, mesh: jax.sharding.Mesh | None, gate: ttt.GateRule, params: Params, tokens_BT: jax.Array,
    start_B: jax.Array, length_B: jax.Array, eta: jax.Array, settings: ttt.GateSettings,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Returns the summed loss of tokens ``start_B`` to ``length_B``, and whether all of them were the likeliest."""
    reading = Reading(piece_tokens(model), tokens_BT.shape[1], gate, wants_nll=True, wants_likeliest=True)
    with using_mesh(mesh):
        tokens_BT = constrain(tokens_BT, "batch", None)
        read, _ = read_documents(
            bind(model, params), reading, tokens_BT, length_B, jnp.zeros_like(length_B), eta=eta, gate=settings
        )
        assert read.nll_BP is not None and read.likeliest_BP is not None
        asked_BT = jnp.arange(tokens_BT.shape[1])[None] >= start_B[:, None]
        nll_B = jnp.sum(jnp.where(asked_BT, read.nll_BP, 0.0), axis=1)
        greedy_B = jnp.all(read.likeliest_BP | ~asked_BT, axis=1)
        return constrain(nll_B, None), constrain(greedy_B, None)
