"""RULER (arXiv 2404.06654): tasks, samples of the authors' generator, answers, scores."""
