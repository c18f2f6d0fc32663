"""YAML to dataclasses: positions, overrides, JSON Schema. Knows no field of ours.

    document.read, document.parse   a file or a text -> Document, with the place of everything in it
    check.check                     Document -> instance of a dataclass, or every mistake at its place
    check.validate                  the same for a part of it, inside the validator of a field
    write.dump, write.to_yaml       instance -> plain data -> YAML that reads back equal
    fields.fields, schema.schema    what a block may hold, for people and for editors
    near.did_you_mean               a hint for a mistyped name

Nothing is imported here: every block of a recipe imports `config.block`, and only reading one needs the rest.
"""
