"""How far two tensors are apart."""

from torch import Tensor


def distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference, in standard deviations of ``expected``."""
    assert found.shape == expected.shape, f"{list(found.shape)} against {list(expected.shape)}"
    found, expected = found.double(), expected.double()
    return ((found - expected).abs().max() / expected.std()).item()
