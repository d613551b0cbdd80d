"""The real Milvus server, one process with everything in it, on the ports that it has everywhere.

It listens on every interface: start it in a private network only. ``make servers`` fetches it.
"""

from __future__ import annotations

import lzma
import os
import re
import shutil
import sys
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from pymilvus import MilvusClient, MilvusException

from commands.server_process import ServerProcess
from tests.support.missing import missing

__all__ = ["MilvusElsewhere", "MilvusServer", "unpack"]

_METRICS_PORT = 9091
# The template's own are among the ports that outgoing connections take.
_PORTS = {
    "root_coord_port": "23100",
    "proxy_port": "19530",
}

# A line of the template, and what stands there for us.
_SETTINGS = {
    # Seconds. After a kill -9 the next start waits until the killed one's session is over.
    "    ttl: 30": "    ttl: 5",
    # Seconds. A server on its own has nobody to hand its collections over to, and waits this long for it.
    "  gracefulStopTimeout: 1800": "  gracefulStopTimeout: 1",
    # Milliseconds, usually 1000: to load an empty collection then takes 2 s instead of 3.
    "queryCoord:": "queryCoord:\n  checkChannelInterval: 100\n  checkSegmentInterval: 100",
}


class MilvusServer(ServerProcess):
    """``installation`` is what :func:`unpack` wrote. Its data, its settings and its log are in ``folder``."""

    def __init__(self, installation: Path, folder: Path) -> None:
        super().__init__("Milvus", folder / "milvus.log", start_seconds=120.0)
        self.installation = installation
        self.folder = folder
        self.uri = f"http://127.0.0.1:{_PORTS['proxy_port']}"

    def start(self) -> None:
        (self.folder / "configs").mkdir(parents=True, exist_ok=True)
        (self.folder / "configs" / "milvus.yaml").write_text(self._settings())
        # The native part wants a place for its own log; it makes none.
        (self.folder / "logs").mkdir(exist_ok=True)
        shutil.copyfile(self.installation / "glog.conf", self.folder / "configs" / "glog.conf")
        programs = self.installation / "bin"
        environment = {
            **os.environ,
            "DEPLOY_MODE": "STANDALONE",
            "METRICS_PORT": str(_METRICS_PORT),
            "MILVUS_RUN_DIR": str(self.folder / "run"),
            "LD_LIBRARY_PATH": f"{programs}:{os.environ.get('LD_LIBRARY_PATH', '')}",
        }
        self._run([programs / "milvus", "run", "standalone"], self._answers, cwd=self.folder, env=environment)

    def _settings(self) -> str:
        """The template that comes with the server, filled in."""
        values = {
            **_PORTS,
            "etcd_log_level": "warn",
            "etcd_data_dir": str(self.folder / "etcd"),
            "local_storage_dir": str(self.folder / "data"),
            "rocksmq_data_dir": str(self.folder / "rocksmq"),
            "system_log_path": '""',  # the log is what it prints
        }

        def value(placeholder: re.Match[str]) -> str:
            name, default = placeholder["name"], placeholder["default"]
            return values.get(name, default)

        template = (self.installation / "config.yaml.template").read_text("utf-8")
        filled = re.sub(r"\{\{ *(?P<name>\w+)(?:\(\w+\))?(?:: *(?P<default>[^}]*?))? *\}\}", value, template)
        for pattern, ours in _SETTINGS.items():
            filled, changed = re.subn(rf"(?m)^{pattern}", ours, filled)
            assert changed == 1, f"{pattern!r} is {changed} times in this Milvus's settings"
        return filled

    def _answers(self) -> bool:
        try:
            with urlopen(f"http://127.0.0.1:{_METRICS_PORT}/healthz", timeout=2) as answer:
                if answer.read() != b"OK":
                    return False
            client = MilvusClient(self.uri, timeout=2)
        except (URLError, OSError, MilvusException):
            return False
        try:
            client.list_collections(timeout=2)
        except MilvusException:
            return False
        finally:
            client.close()
        return True


class MilvusElsewhere(MilvusServer):
    """A Milvus that somebody else runs (``TEST_MILVUS``): its collections are ours, whether it runs is not."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    @property
    def is_running(self) -> bool:
        return True

    def start(self) -> None:
        missing("a Milvus that this test may stop; run it without TEST_MILVUS")

    stop = kill = restart = start


def unpack(package: Path, installation: Path) -> None:
    """From the folder that pip installed PyPI's ``milvus`` into. Half an installation is never there."""
    data = package / "milvus" / "data"
    unfinished = installation.with_name(installation.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.rmtree(installation, ignore_errors=True)
    (unfinished / "bin").mkdir(parents=True)
    for packed in data.glob("bin/*.lzma"):
        program = unfinished / "bin" / packed.stem
        program.write_bytes(lzma.decompress(packed.read_bytes()))
        program.chmod(0o755)
    for name in ("config.yaml.template", "glog.conf"):
        shutil.copyfile(data / name, unfinished / name)
    unfinished.rename(installation)


if __name__ == "__main__":
    unpack(Path(sys.argv[1]), Path(sys.argv[2]))
