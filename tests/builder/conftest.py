"""Property-based tests run on busy machines: no example has a deadline, and a run is the same each time."""

from hypothesis import settings

settings.register_profile("maskstream", deadline=None, derandomize=True)
settings.load_profile("maskstream")
