"""How many passes are in flight."""

from __future__ import annotations

_MEMORY = 0.9
_WORTH = 0.5


class Waves:
    """A fixed number, or one and a second one while it pays.

    With two, one half of the images has the network while the other waits for rewards. What that saves is at most the
    waiting; what it costs is the part of a network call that does not shrink with its rows. So the second one begins
    where passes wait for rewards at least half as long as they have the network.
    """

    def __init__(self, fixed: int | None) -> None:
        self._fixed = fixed
        self.most = fixed or 2
        self._network_s = self._rewards_s = 0.0

    @property
    def now(self) -> int:
        if self._fixed is not None:
            return self._fixed
        return 2 if self._rewards_s > _WORTH * self._network_s else 1

    def took(self, network_s: float, rewards_s: float) -> None:
        """Notes a pass: seconds in the network, and waiting for rewards outside of this process."""
        self._network_s = _MEMORY * self._network_s + network_s
        self._rewards_s = _MEMORY * self._rewards_s + rewards_s
