"""Results for people: tables, plots, pictures, a page of the best and worst images. Nothing here computes a metric."""
