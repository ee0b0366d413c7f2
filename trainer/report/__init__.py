"""Results for people: tables, plots, pictures, and a page of the best and worst images. No metric is computed here."""
