import subprocess
import sys

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.support import REPOSITORY
from trainer.run.plots import downsampled, draw_curves


def test_the_backend_of_a_notebook_that_is_not_installed_here_does_not_matter() -> None:
    """As in `!maskstream train` in a notebook, with an environment of its own."""
    environment = {"MPLBACKEND": "module://a_notebook.inline", "PYTHONPATH": str(REPOSITORY), "PATH": ""}
    code = "from trainer.run.plots import Figure, png; print(png(Figure())[1:4])"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("b'PNG'\n", "")


@given(st.integers(1, 3000), st.integers(1, 50), st.integers(0, 5))
def test_a_downsampled_curve_is_short_and_keeps_its_means(steps: int, points: int, skipped: int) -> None:
    x = np.arange(1.0, steps + 1)
    y = np.sin(x) + 2
    y[:skipped] = np.nan
    middle, mean = downsampled(x, y, points)
    assert len(middle) == len(mean) <= points
    width = -(-steps // points)
    for i, (at, value) in enumerate(zip(middle, mean)):
        part = np.s_[i * width : (i + 1) * width]
        assert np.isclose(at, x[part].mean())
        good = y[part][np.isfinite(y[part])]
        assert np.isclose(value, good.mean()) if len(good) else np.isnan(value)


def test_curves_with_skipped_steps_and_evaluations_without_values() -> None:
    row = {"step": 1, "loss": 1.0, "losses": {"loss_mask": 1.0}, "images_per_s": 2.0, "lr": 0.1}
    bad = {**row, "step": 2, "loss": None, "losses": {"loss_mask": None}}
    none = {"step": 1, **{key: {"ap": None, "ap50": None} for key in ("bbox", "segm")}}
    some = {"step": 2, **{key: {"ap": 0.0, "ap50": 0.25} for key in ("bbox", "segm")}, "open_images": {"ap": 0.5}}
    pictures = [draw_curves([row, bad], evaluations) for evaluations in ([none], [none, some])]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert pictures[0] != pictures[1]
