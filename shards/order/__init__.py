"""In which order the samples of one or several datasets are visited. Arithmetic on arrays: no I/O and no state."""
