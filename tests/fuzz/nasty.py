"""What trips parsers, terminals, paths, templates and regular expressions."""

INTEGERS = (0, 1, 2, 3, 4, 7, 8, 9, 10, 15, 16, 31, 32, 64, 127, 128, 255, 256, 1023, 65535, 65536, 2**24, 2**31 - 1)
INTEGERS += (2**31, 2**32 - 1, 2**32, 2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
"""Around the sizes of fields and of what fits into memory."""

TEXTS = (
    *("", " ", "\0", "\x1b[2J\x1b]0;evil\x07", "\u202eevil", "\ufeff", "\u2028", "\u00e9", "e\u0301", "\U0010ffff"),
    *(
        "\ud800",
        "\ufb03",
        "\u0130",
        "\u00df",
        "\u0661\u0662",
        "\u00bd",
        "\u00b2",
        "\U0001f600",
        "x" * 300,
        "x" * 70_000,
    ),
    *("a.b.c", "..", "../../etc/passwd", "/", "~", "nul", "%s%n", "{0}", "{{ x }}", "{% for", "${HF_TOKEN}"),
    *("!!python/name:os.system", "*a", "&a", "<<", "null", "true", "no", "NaN", "1e999", "-1", "0x10", "1_000", "1:30"),
    *("010", "(a+)+$", "(" * 200, "[", "(?:a|b|c|d){1,9}", ".*" * 12, "\\", "^", "$", "<|im_start|>", "lm_head", "0"),
    *("lora_A", "default", "base_layer", "modules_to_save", "weight", "all-linear"),
)
"""In the place of a name or a value."""

SPLINTERS = (
    *(b"\0", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xc0\x80", b"\r", b"\r\n", b"\n\n", b"\t", b'"'),
    *(b"'", b",", b";", b":", b": ", b"{", b"}", b"[", b"]", b"[" * 2_000, b'{"a":' * 2_000, b"- ", b"#", b"|", b">"),
    *(b"---\n", b"...\n", b"%YAML 1.1\n", b"&a ", b"*a", b"<<: *a", b"!!str ", b"!x ", b"? ", b"\\ud800", b"\\x00"),
    *(b"\\UFFFFFFFF", b"NaN", b"1e999", b"9" * 5_000, b"-0", b"null", b"{{", b"{%", b"%}", b"}}", b"\x1b[2J", b"\x85"),
)
"""In the middle of a text."""
