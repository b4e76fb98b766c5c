"""The configuration groups: values only, in YAML. What a key means is documented where it is used."""
