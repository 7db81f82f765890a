"""A suite as its authors run it: Testcontainers, with nothing in the environment but what `lighter env` prints."""

import unittest
import urllib.request

from testcontainers.core.container import DockerContainer
from testcontainers.core.network import Network
from testcontainers.core.wait_strategies import LogMessageWaitStrategy

# The server is asked by itself before it is said to serve.
SERVE = (
    "mkdir /www; echo ahoy > /www/index.html; httpd -p 8000 -h /www; "
    "until wget -q -O /dev/null http://127.0.0.1:8000/; do :; done; echo serving; exec sleep 100000"
)


def waiting_for(text):
    return LogMessageWaitStrategy(text).with_startup_timeout(600)


def web():
    container = DockerContainer("busybox").with_command(["sh", "-c", SERVE]).with_exposed_ports(8000)
    return container.waiting_for(waiting_for("serving"))


class Containers(unittest.TestCase):
    def test_a_port_of_a_container_is_reached(self):
        with web() as container:
            host, port = container.get_container_host_ip(), container.get_exposed_port(8000)
            with urllib.request.urlopen(f"http://{host}:{port}/", timeout=600) as answer:
                self.assertEqual(answer.read(), b"ahoy\n")

    def test_two_containers_get_two_ports(self):
        with web() as first, web() as second:
            self.assertNotEqual(first.get_exposed_port(8000), second.get_exposed_port(8000))

    def test_a_command_runs_in_a_container(self):
        with DockerContainer("busybox").with_env("CARGO", "tea").with_command(["sleep", "100000"]) as container:
            code, output = container.exec(["sh", "-c", "echo $CARGO; exit 7"])
            self.assertEqual((code, output), (7, b"tea\n"))

    def test_containers_of_a_network_know_each_other(self):
        with Network() as network:
            with web().with_network(network).with_network_aliases("shop"):
                client = DockerContainer("busybox").with_network(network).waiting_for(waiting_for("ahoy"))
                # It stays, so that its end is not seen before its words.
                with client.with_command(["sh", "-c", "wget -q -O - http://shop:8000/; exec sleep 100000"]):
                    pass


unittest.main(verbosity=2)
