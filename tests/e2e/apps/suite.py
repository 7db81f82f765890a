"""A suite as its authors run it: Testcontainers, with nothing in the environment but what `lighter env` prints."""

import unittest
import urllib.request

from testcontainers.core.container import DockerContainer
from testcontainers.core.network import Network
from testcontainers.core.waiting_utils import wait_for_logs

SERVE = "mkdir /www; echo ahoy > /www/index.html; echo serving; exec httpd -f -p 8000 -h /www"


def web():
    return DockerContainer("busybox").with_command(["sh", "-c", SERVE]).with_exposed_ports(8000)


class Containers(unittest.TestCase):
    def test_a_port_of_a_container_is_reached(self):
        with web() as container:
            wait_for_logs(container, "serving", timeout=600)
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
            with web().with_network(network).with_network_aliases("shop") as shop:
                wait_for_logs(shop, "serving", timeout=600)
                client = DockerContainer("busybox").with_network(network)
                with client.with_command(["wget", "-q", "-O", "-", "http://shop:8000/"]) as client:
                    wait_for_logs(client, "ahoy", timeout=600)


unittest.main(verbosity=2)
