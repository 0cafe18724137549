"""Services on other hosts."""

from mosel.exposure import host_of, is_local


def resource_at(resource: str, address: str) -> str:
    """What a service computes on, told apart from the same of other hosts.

    Args:
        resource: as the service says: "cpu", or a GPU's UUID, which no other GPU has.
        address: where the service listens; those on a network are on one host if their addresses name the same.
    """
    return resource if resource != "cpu" or is_local(address) else f"cpu of {host_of(address)}"
