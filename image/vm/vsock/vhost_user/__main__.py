"""``python -m caisson.image.vm.vsock.vhost_user --fd N --cid CID --socket DIR/vsock.sock --raw DIR/agent.sock=1024``

Or ``python -I -S FILE …``, which starts without the packages around it and what they import (nor importlib's): then
there is no package yet that relative imports could refer to, and it is imported as one of its own.
"""

from __future__ import annotations

import os
import sys

if not __package__:
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120

status = __import__(f"{__package__ or 'vhost_user'}.process", fromlist=["main"]).main()
sys.stderr.flush()
os._exit(status)  # a VM's end waits for this, and to take down the interpreter takes 6 ms
