"""What a JSON file of ``benchmarks.loader`` has to hold. Its sections beside the loaders are newer than the oldest reports: each may be missing."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from benchmarks.report_base import Count, Model, NotNegative, Numbers, Positive, Report, in_order


class Ratio(Model):
    """Of positive numbers: the turns' median, lowest and highest."""

    median: Positive
    lowest: Positive
    highest: Positive

    @model_validator(mode="after")
    def _ordered(self) -> Ratio:
        in_order(self.lowest, self.median, self.highest)
        return self


class Counted(Model):
    """The same of numbers that can be 0."""

    median: NotNegative
    lowest: NotNegative
    highest: NotNegative

    @model_validator(mode="after")
    def _ordered(self) -> Counted:
        in_order(self.lowest, self.median, self.highest)
        return self


class Indexing(Numbers):
    needed: ClassVar[tuple[str, ...]] = ("mb_per_cpu_second", "plain_mb_per_cpu_second", "to_plain", "target")
    mb_per_cpu_second: Ratio | None = None
    plain_mb_per_cpu_second: Ratio | None = None
    to_plain: Ratio | None = None
    target: Positive | None = None


class Check(Numbers):
    needed: ClassVar[tuple[str, ...]] = ("check_us", "check_to_dali", "strict_to_dali", "check_to_pillow", "target")
    check_us: Ratio | None = None
    check_to_dali: Ratio | None = None
    strict_to_dali: Ratio | None = None
    check_to_pillow: Ratio | None = None
    target: Positive | None = None


class Reading(Model):
    to_local: Ratio


class Cold(Model):
    name: Annotated[str, Field(min_length=1)]
    batch: Count
    shard_s: Positive
    shards_sent: Counted
    target: Count
    first_batch_s: Ratio
    whole_set_s: Ratio
    first_to_whole: Ratio


class Streaming(Numbers):
    needed: ClassVar[tuple[str, ...]] = ("images", "shards", "target", "reading", "loader", "cold")
    images: Count | None = None
    shards: Count | None = None
    target: Positive | None = None
    reading: Reading | None = None
    loader: Reading | None = None
    cold: Annotated[list[Cold], Field(min_length=1)] | None = None


class Format(Numbers):
    needed: ClassVar[tuple[str, ...]] = ("images_per_sec", "cpu_us_per_image", "bytes_per_image")
    name: Annotated[str, Field(min_length=1)]
    images_per_sec: Ratio | None = None
    cpu_us_per_image: Counted | None = None  # counted in ticks of a clock, none of which may fall into a short turn
    bytes_per_image: Positive | None = None
    to_jpg: Ratio = None  # left out where there is none


class Formats(Numbers):
    needed: ClassVar[tuple[str, ...]] = ("images", "entries")
    images: Count | None = None
    entries: Annotated[list[Format], Field(min_length=1)] | None = None


class LoaderEntry(Numbers):
    name: str
    images_per_sec: Positive | None = None
    lowest: Positive | None = None
    highest: Positive | None = None
    cpu_s_per_1000: NotNegative | None = None
    to_dali: Ratio = None  # left out where there is none
    to_webdataset: Ratio = None  # left out where there is none


class Loader(Report):
    cores: Count = 1
    size: Count
    entries: list[LoaderEntry]
    indexing: Indexing | None = None
    check: Check | None = None
    streaming: Streaming | None = None
    formats: Formats | None = None

    @model_validator(mode="after")
    def _something(self) -> Loader:
        if not self.entries and not any((self.indexing, self.check, self.streaming, self.formats)):
            raise ValueError("neither a loader nor anything else was measured")
        return self
