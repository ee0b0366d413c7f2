"""A training run: its state, its ranks, its optimizer, its folder and log, and what a resumed run needs of them."""
