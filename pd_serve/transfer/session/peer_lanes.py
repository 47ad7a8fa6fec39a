"""The lanes between this decode node and one prefill node, for one session: connected, tested, all but one closed
again.

Owned by :class:`pd_serve.transfer.session.source_peer.SourcePeer`, used on the transfer thread.
"""

from __future__ import annotations

from collections.abc import Callable

from pd_serve.errors import HandshakeError, TransferError
from pd_serve.transfer.base import Pair, Peer, Send
from pd_serve.transfer.lanes import Lanes
from pd_serve.transfer.session.probe import Lane, Probe, Prober, Verdict, floor_bytes_per_s
from pd_serve.wire import peer as wire


class PeerLanes:
    """``say``: sends a message to the prefill node."""

    def __init__(
        self, welcome: wire.Welcome, pair: Pair, lanes: Lanes, prober: Prober, say: Callable[[wire.ToSource], None]
    ) -> None:
        self.pair = pair
        self.why_not = dict(welcome.why_not)  # lanes that are not used
        self.verdict = Verdict()
        self.chosen: Lane | None = None
        self.rate = 0.0  # of the chosen one, bytes a second; 0: not measured
        self._welcome = welcome
        self._lanes = lanes
        self._prober = prober
        self._say = say
        self._peers: dict[str, Peer] = {}
        self._probe: Probe | None = None
        self._closed = False

    def connect(self, tested: Callable[[], None]) -> None:
        """Connects and has the lanes tested; ``tested()`` follows. Raises HandshakeError where none connects."""
        for name, why in self._lanes.why_not.items():
            self.why_not.setdefault(name, f"the decode node cannot use it: {why}")
        for name, transport in self._lanes.transports.items():
            if name not in self._welcome.lanes:
                self.why_not.setdefault(name, "the prefill node does not use it")
                continue
            try:
                self._peers[name] = transport.connect(self._welcome.lanes[name], self.pair, self._sender(name))
            except TransferError as error:
                self.why_not[name] = str(error)
        if not self._peers:
            why = "; ".join(f"{name}: {text}" for name, text in self.why_not.items())
            raise HandshakeError(f"no transport connects ({why}); set --transport auto on both")

        def finished(verdict: Verdict) -> None:
            self._probe = None
            self._choose(verdict)
            tested()

        self._probe = self._prober.start(
            {name: (self._lanes.transports[name], peer) for name, peer in self._peers.items()},
            self.pair,
            self._welcome.epoch,
            finished,
        )

    def _sender(self, name: str) -> Send:
        def send(payload: bytes) -> None:
            if not self._closed:
                self._say(wire.LaneMessage(name, payload))

        return send

    def _choose(self, verdict: Verdict) -> None:
        self.verdict = verdict
        self.why_not.update(verdict.why_not)
        name = verdict.fastest()
        if name is None and verdict.untested:
            name = verdict.untested[0]
        for other, rate in verdict.rates.items():
            if other != name:
                self.why_not[other] = f"it is slower ({rate / 1e9:.2f} GB/s)"
        for other in verdict.untested:
            if other != name:
                self.why_not[other] = "it could not be tested: earlier tests have not ended"
        for other in [other for other in self._peers if other != name]:
            self._peers.pop(other).close()
        if name is not None:
            self.chosen = Lane(name, self._lanes.transports[name], self._peers[name])
            self.rate = verdict.rates.get(name, 0.0)

    @property
    def slow(self) -> bool:
        """The chosen lane was not measured, or gives far less than it should."""
        assert self.chosen is not None
        return self.rate < floor_bytes_per_s(self.chosen.name)

    def complaint(self, node_id: str) -> str:
        """What to say when ``slow``."""
        assert self.chosen is not None
        name = self.chosen.name
        if self.rate <= 0:
            return (
                f"transport {name} to prefill node {node_id} could not be tested, because self-tests with other nodes "
                f"hang; is one of them stopped?"
            )
        return (
            f"transport {name} to prefill node {node_id} gives {self.rate / 1e9:.2f} GB/s, less than "
            f"{floor_bytes_per_s(name) / 1e9:g}: it has probably fallen back to something slow. Run pd-serve doctor on "
            f"both machines; UCX_PROTO_INFO=y shows what UCX uses"
        )

    def summary(self) -> str:
        """The choice and its reasons, for the log."""
        assert self.chosen is not None
        rate = f"{self.rate / 1e9:.2f} GB/s" if self.rate > 0 else "not measured"
        return f"{self.chosen.name} ({rate})" + "".join(f"; not {name}: {why}" for name, why in self.why_not.items())

    def receive(self, message: wire.LaneMessage) -> None:
        """Raises TransferError when the lane in use cannot make sense of it; one under test is left to fail."""
        peer = self._peers.get(message.lane)
        if peer is None:  # closed meanwhile
            return
        try:
            peer.receive(message.payload)
        except TransferError:
            if self.chosen is not None:
                raise

    def close(self) -> None:
        self._closed = True
        if self._probe is not None:
            self._prober.cancel(self._probe)
            self._probe = None
        while self._peers:
            self._peers.popitem()[1].close()
