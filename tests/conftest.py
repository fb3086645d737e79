"""For all tests: what the annotations of `common` say of types and shapes is checked at every call."""

from jaxtyping import install_import_hook

# An int is taken where a float is asked for, as the language itself has it (PEP 484).
install_import_hook("common", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")
