"""Many servers behind the methods of one client: ``Pool``.

It rests on ``AsyncClient``, one for each host, and has nothing to do with the connections that a client keeps.
"""

from ollama_async._errors import NoHost

from ._calls import Kind
from ._hosts import Host, HostState
from ._map import Caller, Mapper, MapResult, PoolMap
from ._pool import Pool
from ._stream import PoolStream

__all__ = ["Caller", "Host", "HostState", "Kind", "MapResult", "Mapper", "NoHost", "Pool", "PoolMap", "PoolStream"]
