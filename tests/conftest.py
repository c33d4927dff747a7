"""Shared by all tests. Fixtures of one area live in that area's folder."""

import os

from hypothesis import settings

# CI=true keeps examples reproducible; a developer's run explores.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("dev", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "dev")
