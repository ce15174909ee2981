"""What is known to be wrong before anything that costs money has started.

``deployment`` joins environment, release and specs without asking any service; ``check_buckets`` asks the
object store. Whether image, network, accounts and quota are there, only Dataproc tells, when it creates the
cluster (``dataproc``).
"""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from couponflow.cloud import releases, specs
from couponflow.clouding import CloudConfig
from couponflow.config import Config
from couponflow.errors import ConfigError
from couponflow.lake import storage

#: Python, Spark and Delta by version of the Dataproc image, major and minor.
_IMAGES = {"2.3": {"python": "3.11", "pyspark": "3.5", "delta-spark": "3.3"}}
_IMAGE_VERSION = re.compile(r"-(\d)-(\d)-")


@dataclass(frozen=True)
class Deployment:
    """One environment, the release that it runs, and the specs rendered for both."""

    environment: specs.Environment
    release: releases.Release
    specs: tuple[specs.Spec, ...]

    @property
    def config(self) -> Config:
        """Config of the environment."""
        return self.environment.config

    @property
    def cloud(self) -> CloudConfig:
        """Where it runs."""
        return self.environment.cloud


def deployment(name: str, folder: Path = specs.DEPLOY) -> Deployment:
    """The deployment of this program in an environment, checked as ``couponflow check --deploy`` does.

    Raises:
        ConfigError: the environment or a spec is wrong, or this program does not fit the image.
    """
    environment = specs.load_environment(name, folder)
    release = releases.make(environment)
    findings = [finding for one in specs.check(environment, release.name, folder) for finding in one.findings]
    if findings:
        raise ConfigError(
            f"{findings[0]} ({len(findings)} findings; `couponflow check --deploy {name}` lists them)"
        )
    for image in (environment.cloud.etl.image, environment.cloud.gpu.image):
        check_image(image)
    return Deployment(environment, release, tuple(specs.render(environment.cloud, release.name, folder)))


def _installed(package: str) -> str:
    """Version of what is installed here; empty for what a laptop does without."""
    if package == "python":
        return ".".join(map(str, sys.version_info[:2]))
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def check_image(image: str, installed: Callable[[str], str] = _installed) -> None:
    """Refuse an image whose Python, Spark or Delta is of another minor version than what was tested here.

    Raises:
        ConfigError: the image's name tells no version that is known, or one that does not fit.
    """
    match = _IMAGE_VERSION.search(image.rpartition("/")[2])
    version = f"{match[1]}.{match[2]}" if match else ""
    if version not in _IMAGES:
        raise ConfigError(
            f"image {image}: expected the version of Dataproc in its name, as -2-3-, found "
            f"{version or 'none'}; this program runs on {', '.join(_IMAGES)}"
        )
    for package, expected in _IMAGES[version].items():
        found = installed(package)
        if found and found.split(".")[:2] != expected.split("."):
            raise ConfigError(
                f"image {image}: has {package} {expected}, this program was installed with {found}; submit "
                f"from an environment with {package} {expected}"
            )


def check_buckets(cloud: CloudConfig) -> None:
    """Refuse an environment that names a bucket that is not there.

    Raises:
        ConfigError: naming the bucket.
        InfraError: the object store did not answer.
    """
    for duty, bucket in cloud.buckets.model_dump().items():
        if not storage.has_bucket(bucket):
            raise ConfigError(
                f"bucket {bucket} (cloud.buckets.{duty}) of project {cloud.project} does not exist; create "
                "it or correct the environment"
            )
