"""The documentation site: `make docs`, opened in headless Chromium."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import threading
import zlib
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urljoin

import pytest

import modelstock_jax

ROOT = Path(__file__).parents[2]
SITE = ROOT / "build/site"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def address():
    """The site, built and served on a free port."""
    subprocess.run(["make", "docs"], cwd=ROOT, check=True)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=SITE)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def chromium(address: str, *arguments: str, milliseconds: int = 10_000) -> str:
    """Open an address and return the page after its scripts have run."""
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    assert program, "no Chromium found: apt-get install chromium"
    command = [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--virtual-time-budget={milliseconds}", "--dump-dom", *arguments, address]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def links(html: str) -> list[str]:
    """Return the entries of the menu."""
    menu = html[html.index("bd-docs-nav") :]
    return re.findall(
        r'<a class="reference internal" href="([^"#]+)"', menu[: menu.index("</nav>")]
    )


def test_every_entry_of_the_menu_opens(address):
    index = urljoin(address, "docs/index.html")
    entries = links(chromium(index))
    assert len(entries) > 50 and "api/library.html" in entries
    for entry in entries:
        page = urljoin(index, entry)
        html = chromium(page, milliseconds=1000)
        assert "<h1" in html and "Error response" not in html, page
        for image in re.findall(r'<img [^>]*src="([^"]+)"', html):
            local = urljoin(page, image)
            if local.startswith(address):  # Badges are on another host.
                assert (SITE / local.removeprefix(address)).is_file(), (page, image)


def test_the_search_finds_model_stock(address):
    html = chromium(urljoin(address, "search.html?q=model_stock"))
    results = html[html.index('id="search-results"') :]
    assert "docs/api/library.html#modelstock_jax.model_stock" in results


def test_the_reference_has_every_public_name(address):
    inventory = (SITE / "objects.inv").read_bytes().split(b"\n", 4)[4]
    lines = zlib.decompress(inventory).decode().splitlines()
    names = {line.split()[0] for line in lines if " py:" in line}
    assert {f"modelstock_jax.{name}" for name in modelstock_jax.__all__} <= names
    assert "modelstock_jax.training.trainer.Trainer.run" in names


def test_screenshot(address, tmp_path):
    """A picture to look at: build/site.png."""
    file = ROOT / "build/site.png"
    page = urljoin(address, "docs/api/library.html")
    chromium(page, f"--screenshot={file}", "--window-size=1400,1100")
    assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 20_000
