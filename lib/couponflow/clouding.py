"""Config section ``cloud``: where the jobs run on Dataproc, as whom, on which machines and for how much.

Only a deployed environment has one (``deploy/env/{ci,dev,prod}.toml``). Its values fill the placeholders of
the specs under ``deploy/``, so every text is of a closed alphabet: no quote, brace or line break gets
through.
"""

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from couponflow.values import Day, Loose, Section

#: Of a text that goes into a spec as it is.
Name = Annotated[str, Field(pattern="^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$")]
Bucket = Annotated[str, Field(pattern="^[a-z0-9]([a-z0-9-]{1,61})[a-z0-9]$")]
ServiceAccount = Annotated[
    str,
    Field(pattern=r"^[a-z][a-z0-9-]{4,28}[a-z0-9]@[a-z][a-z0-9-]{4,28}[a-z0-9]\.iam\.gserviceaccount\.com$"),
]
Image = Annotated[
    str, Field(pattern="^projects/[a-z][a-z0-9-]{4,28}[a-z0-9]/global/images/[a-z][a-z0-9-]{1,62}$")
]
Zone = Annotated[str, Field(pattern="^(auto|[a-z]+-[a-z]+[0-9]+-[a-z])$")]
MachineType = Annotated[str, Field(pattern="^[a-z][a-z0-9]*-[a-z]+-[0-9]+g?$")]
LabelKey = Annotated[str, Field(pattern="^[a-z][a-z0-9_-]{0,62}$")]
LabelValue = Annotated[str, Field(pattern="^[a-z0-9_-]{1,63}$")]
#: Of a stand-in of Dataproc: it gets no credentials, so it may only be on this machine.
Loopback = Annotated[str, Field(pattern=r"^((http|grpc)://(127\.0\.0\.1|localhost):[0-9]{1,5})?$")]
Amount = Annotated[float, Field(ge=0.0)]

#: Bounds of the service, seconds.
MIN_IDLE_SECONDS, MIN_AGE_SECONDS, MAX_AGE_SECONDS = 300, 600, 1_209_600


class BucketsConfig(Section):
    """Buckets, without ``gs://``; each has one purpose and its own readers."""

    code: Bucket = Field(description="Releases: package, jobs and config of a version, never overwritten.")
    lake: Bucket = Field(description="Raw feeds, tables, models and run records; lake.root_uri lies in it.")
    staging: Bucket = Field(
        description="What Dataproc itself writes: driver output, event logs, temporaries."
    )


class ServiceAccountsConfig(Section):
    """One account per duty, so that none can do what another is for."""

    etl: ServiceAccount = Field(description="Runs ETL and scoring: reads and writes the lake.")
    train: ServiceAccount = Field(description="Runs training: reads examples, writes models.")
    submit: ServiceAccount = Field(description="Submits workflows; reads no data.")


class _ClusterConfig(Section):
    """What both kinds of cluster have."""

    image: Image = Field(description="Custom image by name, its build date at the end; never a family.")
    zone: Zone = Field(description="Zone, or 'auto': the service picks one of the region with capacity.")
    master_machine: MachineType = Field(description="Machine type of the node that runs the drivers.")
    worker_machine: MachineType = Field(description="Machine type of the workers.")
    num_workers: int = Field(ge=2, description="Primary workers, a fixed number; never spot.")
    disk_gib: int = Field(ge=100, le=65_536, description="GiB of the boot disk of every node.")
    idle_seconds: int = Field(
        ge=MIN_IDLE_SECONDS, le=MAX_AGE_SECONDS, description="Seconds without a job until it is deleted."
    )
    age_seconds: int = Field(
        ge=MIN_AGE_SECONDS, le=MAX_AGE_SECONDS, description="Seconds after which it is deleted in any case."
    )

    @property
    def zone_uri(self) -> str:
        """What the service takes: empty text lets it choose."""
        return "" if self.zone == "auto" else self.zone

    @model_validator(mode="after")
    def _in_order(self) -> "_ClusterConfig":
        if self.idle_seconds > self.age_seconds:
            raise ValueError("idle_seconds <= age_seconds must hold")
        return self


class EtlClusterConfig(_ClusterConfig):
    """CPU cluster of ETL and scoring: primaries hold the shuffle, spot secondaries come and go."""

    max_secondary_workers: int = Field(ge=0, description="Spot workers that autoscaling may add.")


class GpuClusterConfig(_ClusterConfig):
    """Training cluster: GPU primaries only, of fixed size. One rank is one Spark task on one GPU."""

    accelerator: Name = Field(description="GPU type, such as nvidia-l4.")
    gpus_per_worker: int = Field(ge=1, le=16, description="GPUs of one worker; so many ranks run on it.")
    cores_per_gpu: int = Field(ge=1, le=96, description="Cores of one rank.")

    @property
    def executor_cores(self) -> int:
        """One executor per worker holds all its GPUs."""
        return self.gpus_per_worker * self.cores_per_gpu

    @property
    def num_ranks(self) -> int:
        """Ranks of a training; ``training.num_ranks`` has to say the same."""
        return self.gpus_per_worker * self.num_workers


class MachinePrice(Section):
    """List price of one machine family."""

    family: Annotated[str, Field(pattern="^[a-z][a-z0-9]{1,3}$")] = Field(description="Such as n2.")
    vcpu_hour_amount: Amount = Field(description="Per vCPU and hour.")
    gib_hour_amount: Amount = Field(description="Per GiB of memory and hour.")
    spot_vcpu_hour_amount: Amount = Field(description="The same of a spot machine; changes up to daily.")
    spot_gib_hour_amount: Amount = Field(description="The same of a spot machine; changes up to daily.")


class GpuPrice(Section):
    """List price of one GPU type."""

    accelerator: Name = Field(description="Such as nvidia-l4.")
    hour_amount: Amount = Field(description="Per GPU and hour.")


class PricesConfig(Section):
    """List prices of the region: an estimate before a run, not a bill."""

    source_url: Annotated[str, Field(pattern="^https://[^\\s\"'{}]+$")] = Field(
        description="Page that lists them."
    )
    read_date: Day = Field(description="Day on which they were listed so.")
    currency: Literal["USD"] = Field(default="USD", description="Of the amounts below.")
    dataproc_vcpu_hour_amount: Amount = Field(description="Fee of Dataproc per vCPU and hour.")
    disk_gib_month_amount: Amount = Field(description="Boot disk per GiB and month of 730 hours.")
    machines: Annotated[tuple[MachinePrice, ...], Loose] = Field(
        min_length=1, description="One per machine family in use."
    )
    gpus: Annotated[tuple[GpuPrice, ...], Loose] = Field(default=(), description="One per GPU type in use.")

    @model_validator(mode="after")
    def _are_unique(self) -> "PricesConfig":
        names = [price.family for price in self.machines], [price.accelerator for price in self.gpus]
        if any(len(set(listed)) < len(listed) for listed in names):
            raise ValueError("each machine family and each accelerator may stand once")
        return self


class CloudConfig(Section):
    """Used by ``couponflow check --deploy`` and by all that is submitted to Dataproc."""

    environment: Annotated[str, Field(pattern="^[a-z][a-z0-9]{1,15}$")] = Field(
        description="Name of this environment; a label on everything that runs in it."
    )
    project: Annotated[str, Field(pattern="^[a-z][a-z0-9-]{4,28}[a-z0-9]$")] = Field(
        description="Google Cloud project, by id."
    )
    region: Annotated[str, Field(pattern="^[a-z]+-[a-z]+[0-9]+$")] = Field(description="Such as us-west1.")
    endpoint: Loopback = Field(
        default="",
        description="Stand-in of Dataproc in tests, http://127.0.0.1:PORT (REST) or grpc://127.0.0.1:PORT; "
        "empty is Google's own.",
    )
    subnetwork: Name = Field(description="Subnetwork of the region with Private Google Access.")
    network_tag: Name = Field(
        description="Network tag of every node; a firewall rule lets nodes of this tag talk to each other."
    )
    buckets: BucketsConfig = Field(description="Buckets by purpose.")
    service_accounts: ServiceAccountsConfig = Field(description="Service accounts by duty.")
    etl: EtlClusterConfig = Field(description="Cluster of ETL and scoring.")
    gpu: GpuClusterConfig = Field(description="Cluster of training.")
    max_workers: int = Field(
        ge=2, le=1_000, description="Workers, primaries and secondaries, that any cluster may have."
    )
    budget_per_run_amount: float = Field(
        gt=0.0, description="What one workflow may cost at its largest size and longest time, list prices."
    )
    core_seconds_per_gib: float = Field(
        default=300.0,
        gt=0.0,
        description="Core seconds that a GiB of input takes, for the estimate before a job's first shuffle; "
        "the run records of your own runs tell yours (couponflow status). Higher stops jobs earlier.",
    )
    labels: dict[LabelKey, LabelValue] = Field(
        default={}, max_length=16, description="Labels of every cluster and job, such as a cost centre."
    )
    prices: PricesConfig = Field(description="List prices of the region.")

    @model_validator(mode="after")
    def _fits_together(self) -> "CloudConfig":
        wrong = [*self._places(), *self._accounts(), *self._unpriced()]
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    def _places(self) -> list[str]:
        zones = {"etl.zone": self.etl.zone, "gpu.zone": self.gpu.zone}
        wrong = [
            f"{name} = {zone} is not in region {self.region}"
            for name, zone in zones.items()
            if zone != "auto" and zone.rpartition("-")[0] != self.region
        ]
        buckets = (self.buckets.code, self.buckets.lake, self.buckets.staging)
        return [*wrong, *(["buckets must differ"] if len(set(buckets)) < len(buckets) else [])]

    def _accounts(self) -> list[str]:
        accounts = self.service_accounts
        emails = (accounts.etl, accounts.train, accounts.submit)
        wrong = [
            f"service account {email} is not of project {self.project}"
            for email in emails
            if not re.search(rf"@{self.project}\.iam\.", email)
        ]
        return [*wrong, *(["service accounts must differ"] if len(set(emails)) < len(emails) else [])]

    def _unpriced(self) -> list[str]:
        priced = {price.family for price in self.prices.machines}
        machines = [m for c in (self.etl, self.gpu) for m in (c.master_machine, c.worker_machine)]
        families = sorted({machine.partition("-")[0] for machine in machines} - priced)
        wrong = [f"prices.machines has no family {family}" for family in families]
        if self.gpu.accelerator not in {price.accelerator for price in self.prices.gpus}:
            wrong.append(f"prices.gpus has no accelerator {self.gpu.accelerator}")
        return wrong
