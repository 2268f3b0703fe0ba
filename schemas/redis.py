"""Where the first-seen table lies."""

from typing import Self

from pydantic import Field, model_validator

from schemas.lanes import Section


class RedisSettings(Section):
    """The first-seen table. Without a URL, duplicates are known only to each worker."""

    url: str | None = Field(
        "redis://127.0.0.1:6379/0",
        description="`redis://host:port/db`; empty: duplicates are known to each worker alone.",
    )
    more_urls: list[str] = Field(
        [],
        description="Further Redis servers: event ids are spread over `url` and these, by hash.",
    )
    timeout_ms: float = Field(
        1000, gt=0, description="To connect and for an answer; then the local table answers alone."
    )
    key_prefix: str = Field("tapeline:seen:", description="In front of each key in Redis.")
    ttl_s: int = Field(3600, ge=1, description="How long an event id is remembered, at least.")
    max_ids: int = Field(
        3_000_000,
        ge=2,
        description="Ids in each Redis at most, 130 bytes each. More than half of them in "
        "`redis.ttl_s`, and they are forgotten earlier, with a warning.",
    )
    max_local_ids: int = Field(200_000, ge=1, description="Event ids kept in each worker's LRU.")
    across_lanes: bool = Field(
        True, description="An event id counts once in all lanes together; false: once in each."
    )

    @property
    def urls(self) -> list[str]:
        """Of all servers; none: the settings do without."""
        return [self.url, *self.more_urls] if self.url else []

    @model_validator(mode="after")
    def _more_are_more(self) -> Self:
        if self.more_urls and not self.url:
            raise ValueError("url is empty, and more_urls is not; set url, or leave out both")
        if len(set(self.urls)) < len(self.urls):
            raise ValueError("url and more_urls name a server twice; name each once")
        return self
