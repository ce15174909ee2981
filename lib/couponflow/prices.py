"""What a cluster costs per hour by the list prices of an environment: an estimate, before anything runs.

    node     vCPUs x (machine + fee of Dataproc) + GiB of memory + GiB of disk + GPUs
    least    the nodes that the spec asks for;  most: with every secondary that autoscaling may add

Not in it: network, objects, logs, discounts, and what the same machines cost while they start.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from couponflow.clouding import CloudConfig, PricesConfig
from couponflow.errors import ConfigError

_HOURS_OF_A_MONTH = 730
#: GiB of memory per vCPU of the predefined machine types.
_GIB_PER_VCPU = {
    ("n1", "standard"): 3.75,
    ("n1", "highmem"): 6.5,
    ("n1", "highcpu"): 0.9,
    ("n2", "standard"): 4.0,
    ("n2", "highmem"): 8.0,
    ("n2", "highcpu"): 1.0,
    ("e2", "standard"): 4.0,
    ("e2", "highmem"): 8.0,
    ("e2", "highcpu"): 1.0,
    ("g2", "standard"): 4.0,
}


@dataclass(frozen=True)
class HourlyPrice:
    """Estimated price of an hour in the currency of the price table."""

    least: float
    most: float


def hourly_price(cluster: Mapping[str, Any], cloud: CloudConfig, max_secondaries: int = 0) -> HourlyPrice:
    """The price of a cluster as rendered; ``max_secondaries`` is the most that its autoscaling may add.

    Raises:
        ConfigError: a machine type or GPU that has no price; the message names it.
    """
    prices = cloud.prices
    groups = [cluster.get("masterConfig", {}), cluster.get("workerConfig", {})]
    fixed = sum(_group_price(group, int(group.get("numInstances", 1)), prices) for group in groups)
    # Secondaries take the machine of the primaries unless they name another.
    secondary = {**cluster.get("workerConfig", {}), **cluster.get("secondaryWorkerConfig", {})}
    asked = int(cluster.get("secondaryWorkerConfig", {}).get("numInstances", 0))
    least = fixed + _group_price(secondary, asked, prices)
    return HourlyPrice(least, fixed + _group_price(secondary, max(asked, max_secondaries), prices))


def core_hour_price(machine: str, prices: PricesConfig) -> float:
    """The price of a vCPU of a machine for an hour, on demand: with its memory and the fee of Dataproc.

    Raises:
        ConfigError: the machine type has no price.
    """
    return _node_price({"machineTypeUri": machine}, prices) / _shape(machine)[1]


def gpu_hour_price(accelerator: str, prices: PricesConfig) -> float:
    """The price of one GPU for an hour.

    Raises:
        ConfigError: the GPU type has no price.
    """
    return _gpu_price({"acceleratorTypeUri": accelerator}, prices)


def _group_price(group: Mapping[str, Any], count: int, prices: PricesConfig) -> float:
    return count * _node_price(group, prices) if count else 0.0


def _node_price(group: Mapping[str, Any], prices: PricesConfig) -> float:
    machine = str(group.get("machineTypeUri", ""))
    family, vcpus, gib = _shape(machine)
    priced = {price.family: price for price in prices.machines}
    if family not in priced:
        raise ConfigError(
            f"machine type {machine} has no price; add family {family} to cloud.prices.machines"
        )
    price = priced[family]
    is_spot = group.get("preemptibility") in ("SPOT", "PREEMPTIBLE")
    per_vcpu = price.spot_vcpu_hour_amount if is_spot else price.vcpu_hour_amount
    per_gib = price.spot_gib_hour_amount if is_spot else price.gib_hour_amount
    disk = int(group.get("diskConfig", {}).get("bootDiskSizeGb", 0))
    return (
        vcpus * (per_vcpu + prices.dataproc_vcpu_hour_amount)
        + gib * per_gib
        + disk * prices.disk_gib_month_amount / _HOURS_OF_A_MONTH
        + sum(_gpu_price(one, prices) for one in group.get("accelerators", ()))
    )


def _gpu_price(accelerator: Mapping[str, Any], prices: PricesConfig) -> float:
    name = str(accelerator.get("acceleratorTypeUri", ""))
    priced = {price.accelerator: price.hour_amount for price in prices.gpus}
    if name not in priced:
        raise ConfigError(f"accelerator {name} has no price; add it to cloud.prices.gpus")
    return priced[name] * int(accelerator.get("acceleratorCount", 1))


def _shape(machine: str) -> tuple[str, int, float]:
    """Family, vCPUs and GiB of a predefined machine type, all of which its name tells."""
    family, _, rest = machine.partition("-")
    kind, _, size = rest.partition("-")
    per_vcpu = _GIB_PER_VCPU.get((family, kind))
    if per_vcpu is None or not size.isdecimal():
        known = ", ".join("-".join(pair) for pair in _GIB_PER_VCPU)
        raise ConfigError(
            f"machine type {machine!r} has no known size; take one of {known}, such as n2-standard-8"
        )
    return family, int(size), int(size) * per_vcpu
