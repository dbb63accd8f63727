"""The section `profile`: counts and accuracy on the test images."""

from typing import Annotated

from pydantic import Field

from stages.params.section import Count, Section, Seed


class Profile(Section):
    batch_size: Count = 256
    """Images that are evaluated at once; only the speed of the stage depends on it. Unit: images."""
    corrupted_images: Annotated[int, Field(ge=0)] = 1000
    """Test images on which each corruption is tried, at most; 0 tries none. Unit: images."""
    corruption_seed: Seed = 0
    """Seed of the corruptions and of the choice of images."""
