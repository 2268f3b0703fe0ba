"""The process of a Serve replica, to look at or to stop."""

import psutil


def replica_process(app_name: str, deployment: str = "model") -> psutil.Process:
    """The only one of that deployment."""
    name = f"ray::ServeReplica:{app_name}:{deployment}"
    [found] = [
        one
        for one in psutil.process_iter(["cmdline"])
        if (one.info["cmdline"] or [""])[0].startswith(name)
    ]
    return found
