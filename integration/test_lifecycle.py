"""An attachment's life, with the real bridge plugin and real connections."""
import lab


def test_an_attachment_comes_and_goes(bin_dir):
    """ADD answers, ADD again changes nothing, CHECK agrees, DEL leaves nothing, DEL again succeeds."""
    network = lab.Network(lab.bridge_conflist(), bin_dir)
    client = lab.wire("client", ("192.0.2.1/24",), ("192.0.2.2/24",))
    first = lab.Container(network, "first", [{"hostPort": 9999, "containerPort": 1}])
    empty = lab.table()
    ports = [{"hostPort": 8080, "containerPort": 80}]
    web = lab.Container(network, "web", ports)
    server = lab.Server("web", web, 80)
    assert lab.exchange(client, "192.0.2.1", 8080) == lab.Saw("web", "192.0.2.2", 80)
    once = lab.table()
    lab.call_plugin(bin_dir / "portmap", "ADD", network._config(network.conflist["plugins"][1], ports, web.result),
                    web.id, web.namespace.path)
    assert lab.table() == once
    web.check()
    web.remove()
    assert lab.table() == empty
    assert lab.exchange(client, "192.0.2.1", 8080, timeout=lab.HASTY) is None
    server.close()
    first.remove()
