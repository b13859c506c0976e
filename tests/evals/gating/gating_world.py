"""A world with the model's recurrence, small enough to be tried out completely: fast linear regression in numpy.

Chunk i is predicted with the sum of what the gated chunks before it wrote, so decisions interact. ``linear`` takes the
quadratic term away, and with it every interaction.
"""

from __future__ import annotations

import numpy as np


class World:
    """Losses and gradients of N documents; z_NMCF is read, v_NMCD written and y_NMCD wanted, for one or n layers.

    With n layers each has a state, its own keys ``z_nNMCF``, and the predictions of all are added.
    """

    def __init__(self, z_nNMCF, v_NMCD, y_NMCD, valid_N, *, eta=0.1, linear=False):
        self.z, self.v, self.y, self.eta, self.linear = z_nNMCF, v_NMCD, y_NMCD, eta, linear
        self.chunks, tokens = z_nNMCF.shape[2:4]
        self.weights_NM = tokens * (np.arange(self.chunks)[None] < np.asarray(valid_N)[:, None]).astype(np.float64)
        self.calls = []

    def __call__(self, documents, gates):
        self.calls.append((documents.copy(), gates.copy()))
        nll_RM = np.stack([self._document(d, g)[0] for d, g in zip(documents, gates, strict=True)])
        nll_RM[self.weights_NM[documents] == 0] = np.nan  # nobody may look at these
        return nll_RM

    def gradients(self, documents, gates):
        nll_RM, slope_RM = np.zeros(gates.shape), np.zeros(gates.shape)
        for r, (d, gates_M) in enumerate(zip(documents, gates, strict=True)):
            nll_RM[r], errors = self._document(d, gates_M)
            slope_RM[r] = self._slopes(d, errors)
        return nll_RM, slope_RM

    def _document(self, d, gates):
        """Returns nll_M and dnll/d prediction of every chunk."""
        gates_Mn = np.broadcast_to(gates.reshape(self.chunks, -1), (self.chunks, len(self.z)))
        s_nDF = np.zeros((len(self.z), self.v.shape[-1], self.z.shape[-1]))
        nll_M, errors = np.zeros(self.chunks), []
        for i in range(self.chunks):
            z_nCF = self.z[:, d, i]
            o_CD = np.einsum("ndf,ncf->cd", s_nDF, z_nCF)
            error_CD = -self.y[d, i] if self.linear else o_CD - self.y[d, i]
            nll_M[i] = (error_CD * o_CD).sum() if self.linear else 0.5 * (error_CD**2).sum()
            errors.append(error_CD)
            s_nDF = s_nDF + self.eta * gates_Mn[i][:, None, None] * np.einsum("cd,ncf->ndf", self.v[d, i], z_nCF)
        nll_M += 50.0
        return nll_M * (self.weights_NM[d] > 0), errors

    def _slopes(self, d, errors):
        """dJ/dg_i = eta <U_i, sum over later chunks j of dnll_j / dS>."""
        slopes_M, g_nDF = np.zeros(self.chunks), 0.0
        for i in reversed(range(self.chunks)):
            z_nCF = self.z[:, d, i]
            slopes_M[i] = self.eta * (np.einsum("cd,ncf->ndf", self.v[d, i], z_nCF) * g_nDF).sum()
            g_nDF = g_nDF + np.einsum("cd,ncf->ndf", errors[i], z_nCF) * (self.weights_NM[d, i] > 0)
        return slopes_M


def random_world(seed, *, documents=5, chunks=6, valid=None, layers=1, linear=False, eta=0.3):
    """Documents with a hidden matrix each; some of their chunks write noise."""
    generator = np.random.default_rng(seed)
    tokens, wide, out = 4, 3, 2
    z = generator.normal(size=(layers, documents, chunks, tokens, wide))
    hidden = generator.normal(size=(layers, documents, out, wide))
    y = np.einsum("lndf,lnmcf->nmcd", hidden, z) / layers + 0.3 * generator.normal(
        size=(documents, chunks, tokens, out)
    )
    noisy = generator.random((documents, chunks, 1, 1)) < 0.4
    v = np.where(noisy, 2.0 * generator.normal(size=y.shape), y)
    valid = np.full(documents, chunks) if valid is None else np.asarray(valid)
    return World(z, v, y, valid, eta=eta / tokens, linear=linear)
