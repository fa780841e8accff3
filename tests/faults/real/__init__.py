"""Faults on real servers: processes and servers that die, freeze, forget and lie, and what must hold all the same.

`python -m tests.faults.real`; docs/faults.md says what is promised. The servers are in servers.py, what runs on
them in stack.py, the vocabulary of a fault in suite.py, and the faults in *_faults.py. checker.py judges.
"""

from tests.faults.real import job_faults, network_faults, process_faults, server_faults
from tests.faults.real.servers import Servers, running_servers
from tests.faults.real.stack import RealStack, real_stack
from tests.faults.real.suite import FAULTS, Fault, Finding, execute, keep_evidence

__all__ = [
    "FAULTS",
    "Fault",
    "Finding",
    "RealStack",
    "Servers",
    "execute",
    "job_faults",
    "keep_evidence",
    "network_faults",
    "process_faults",
    "real_stack",
    "running_servers",
    "server_faults",
]
