"""Results for people: tables, plots, pictures and a page of the best and worst images. It computes no metric."""
