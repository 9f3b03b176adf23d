from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def diffusion_bundle():
    return Path("/work/main/bundles/shapes-diffusion-int8")


@pytest.fixture(scope="session")
def vlm_bundle():
    return Path("/work/main/bundles/shapes-vlm-int8")
