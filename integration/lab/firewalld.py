"""firewalld with a system bus of its own, on any machine that has its package."""
from .processes import until
from .userland import Userland

# Nothing is activated: without polkit, firewalld trusts root.
BUS = """
<busconfig>
  <listen>unix:path=/run/dbus/system_bus_socket</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/><allow own="*"/><allow send_destination="*"/><allow receive_sender="*"/>
  </policy>
</busconfig>
"""


class Firewalld:
    """A context manager: firewalld runs in a machine, and is ready."""

    def __init__(self, machine: Userland) -> None:
        self._machine = machine

    def __enter__(self) -> "Firewalld":
        self._machine.write("/etc/dbus.conf", BUS)
        self._machine.run("mkdir", "-p", "/run/dbus")
        self._bus = self._machine.daemon("dbus-daemon", "--config-file=/etc/dbus.conf", "--nofork", "--nopidfile")
        assert until((self._machine.root / "run/dbus/system_bus_socket").exists), self._bus.last_words()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._bus.stop()
        self._machine.run("rm", "-f", "/run/dbus/system_bus_socket")

    def start(self) -> None:
        self._daemon = self._machine.daemon("firewalld", "--nofork", "--nopid")
        assert until(lambda: self._machine.run("firewall-cmd", "--state", check=False) == "running\n", 60), \
            self._daemon.last_words()

    def stop(self) -> None:
        self._daemon.stop()

    def command(self, *options: str) -> str:
        """Run firewall-cmd."""
        return self._machine.run("firewall-cmd", *options)

    def shell(self, commands: str) -> str:
        """Run what somebody has typed."""
        return self._machine.shell(commands)
