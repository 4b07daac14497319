"""doctor --probe: a half-open connection from this host to each address of the port."""
from collections.abc import Iterator

from ...linux.probe import ANSWERED, FORBIDDEN, REFUSED, probe
from .finding import HOST, LOCALHOST
from .scene import Scene, end, shown

WORDS = {ANSWERED: "the container answered", REFUSED: "refused: nothing listens there",
         FORBIDDEN: "a rule of this host does not let it out"}


def probes(scene: Scene) -> Iterator[str]:
    """A line for each address that was tried."""
    for target in scene.targets:
        for trip in scene.trips(target):
            source, destination = trip.packet.source, trip.packet.destination
            if trip.path in (HOST, LOCALHOST) and target.protocol == "tcp" and source and destination:
                try:
                    found = WORDS.get(probe(source, destination, target.port), "nothing came back within a second")
                except OSError as error:  # no capability NET_RAW, or no way
                    found = f"not possible: {error.strerror}"
                yield f"probe of {end(shown(destination), target.port)}/tcp from this host: {found}"
