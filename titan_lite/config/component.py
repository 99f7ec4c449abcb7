"""Components: classes that own a `Config`, and slots: families of which a TOML table chooses one by `type`.

    class Norm(Component):                       # a slot: its Config names the slot and the default
        class Config(SlotConfig):
            slot: ClassVar[str] = "norm"
            default_type: ClassVar[str] = "rmsnorm"

    class RMSNorm(Norm):                         # an inhabitant: its Config adds `type`
        class Config(Norm.Config):
            type: Literal["rmsnorm"] = "rmsnorm"
            eps: float = 1e-5

A field annotated `norm: Norm.Config` then accepts `{type = "rmsnorm", eps = 1e-6}`, the bare string `"rmsnorm"`, or a
Config object, and `config.norm.build(dim=...)` makes the component: sizes are passed down, choices are in the TOML.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, cast

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema
from typing_extensions import Self

from titan_lite.config.errors import Problem

if TYPE_CHECKING:
    from titan_lite.job import Job


class ConfigBase(BaseModel):
    """Base of every TOML table: immutable, typed strictly, no unknown keys, documented by field docstrings."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    component: ClassVar[type[Component]]

    def build(self, *args: Any, **sizes: Any) -> Any:
        """Makes the component that owns this Config; `sizes` are what its parent knows and the TOML does not repeat."""
        return cast(Any, self.component)(self, *args, **sizes)

    def problems(self, job: Job, world_size: int | None) -> Iterable[Problem]:
        """What is wrong beyond single fields: fields or sections against each other, the world size, missing files.

        Runs in every check and every start; must not start torch.distributed. `world_size` None = not known.
        Keys that begin with "." are relative to this table.
        """
        return ()

    def notices(self, job: Job, world_size: int | None) -> Iterable[str]:
        """One warning line for each setting that is accepted but does something else than it seems to.

        A line that begins with "." begins with a key relative to this table.
        """
        return ()


class SlotConfig(ConfigBase):
    """Config of a slot. The class with `slot` in its body is the family; subclasses with a `type` are the choices."""

    slot: ClassVar[str]
    default_type: ClassVar[str | None] = None
    choices: ClassVar[dict[str, type[SlotConfig]]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "slot" in vars(cls):
            cls.choices = {}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        if "slot" not in vars(cls):
            return handler(source)
        return core_schema.no_info_plain_validator_function(
            cls.choose,
            serialization=core_schema.plain_serializer_function_ser_schema(lambda config: config.model_dump()),
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        if "slot" not in vars(cls):
            return handler(schema)
        tables = [handler(choice.__pydantic_core_schema__) for choice in cls.choices.values()]
        return {"anyOf": [*tables, {"enum": sorted(cls.choices)}]}

    @classmethod
    def choose(cls, value: Any) -> Self:
        """Validates `value` as the choice its `type` names (errors keep their place in the whole file)."""
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            value = {"type": value}
        if not isinstance(value, Mapping):
            raise PydanticCustomError("slot_table", "expected a table with a `type`, or the type's name")
        name = value.get("type", cls.default_type)
        if not isinstance(name, str) or name not in cls.choices:
            raise PydanticCustomError(
                "slot_type",
                "{problem}",
                {
                    "problem": "`type` is missing" if name is None else f"no {cls.slot} has the type {name!r}",
                    "allowed": sorted(cls.choices),
                },
            )
        return cast(Self, cls.choices[name].model_validate(dict(value)))


class Component:
    """Something a TOML table describes. Constructed as `Config.build(**sizes)`, never directly from the outside."""

    Config: type[ConfigBase]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        config = vars(cls).get("Config")
        if config is None:
            return
        config.component = cls
        if issubclass(config, SlotConfig) and "type" in config.model_fields:
            name = config.model_fields["type"].default
            taken = config.choices.setdefault(name, config)
            assert taken is config, f"two components of the slot {config.slot!r} are called {name!r}"


def slots(root: type[SlotConfig] = SlotConfig) -> Iterator[type[SlotConfig]]:
    """Every slot family that has been imported, depth first."""
    for sub in root.__subclasses__():
        if "slot" in vars(sub):
            yield sub
        yield from slots(sub)
