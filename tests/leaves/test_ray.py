"""``RayPool`` where Ray is not installed, or does nothing; tests/cluster has the rest."""

from __future__ import annotations

import ssl
import sys
import types
from typing import Any

import pytest

from ollama_async import RequestError
from ollama_async.ray import RayHost, RayPool


def test_without_ray_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r'pip install "ollama-async\[ray\]"'):
        RayPool()


URL = "http://127.0.0.1:11434"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"hosts": []}, r"hosts=\[\]: give at least one RayHost, or None"),
        ({"hosts": URL}, "hosts=str: give a list of RayHost"),
        ({"hosts": 3}, "hosts=int: give a list of RayHost"),
        ({"hosts": [URL]}, r"hosts has a str in it: give RayHost\("),
        ({"hosts": [RayHost(), RayHost(slots=2)]}, f"{URL} is there twice"),
        ({"hosts": [RayHost(resources={"a": 1}), RayHost("127.0.0.1:11434", resources={"a": 1})]}, "is there twice"),
        ({"hosts": [RayHost("ftp://a")]}, "scheme 'ftp'"),
        ({"hosts": [RayHost(3)]}, "url=3 of a host"),
        ({"hosts": [RayHost(slots=0)]}, f"slots=0 of {URL}"),
        ({"hosts": [RayHost(slots="3")]}, f"slots='3' of {URL}"),
        ({"slots": True}, f"slots=True of {URL}"),
        ({"url": "http://a:x"}, "invalid host"),
        ({"hosts": [RayHost(resources="gpu1")]}, "resources='gpu1': give names and amounts"),
        ({"hosts": [RayHost(resources={"gpu1": "1"})]}, "resources={'gpu1': '1'}: give names and amounts"),
        ({"hosts": [RayHost(resources={"gpu1": 0})]}, "resources={'gpu1': 0}"),
        ({"hosts": [RayHost(node_id=5)]}, "node_id=5: give the NodeID"),
        ({"hosts": [RayHost(models="fake")]}, "models='fake'"),
        ({"address": 5}, "address=5: give the address of a Ray cluster"),
        ({"address": ""}, "address='': give the address"),
        ({"patience": -1}, "patience=-1"),
        ({"token": "stop"}, "token='stop'"),
        ({"transport": None}, "transport= does not go with RayPool"),
        ({"http_client": None}, "http_client= does not go with RayPool"),
        ({"verify": ssl.create_default_context()}, "verify=SSLContext: give True, False, or the path"),
        ({"proxy": "socks5://a"}, "proxy= needs an http:// proxy"),
    ],
)
def test_it_says_what_is_wrong_with_what_it_is_given(
    given: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", types.ModuleType("ray"))
    with pytest.raises(RequestError, match=says):
        RayPool(**given)


def test_servers_at_the_same_address_are_told_apart_by_their_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", types.ModuleType("ray"))
    pool = RayPool([RayHost(resources={"gpu1": 1}), RayHost(resources={"gpu2": 1}), RayHost(node_id="f00")])
    assert [host.url for host in pool.hosts] == [URL] * 3
    with pytest.raises(RequestError, match="several hosts"):
        pool.client(URL)
    assert RayPool(url="http://a", slots=3).hosts[0].slots == 3
