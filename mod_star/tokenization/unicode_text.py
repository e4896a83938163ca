"""Text that UTF-8 can represent, which is what a tokenizer encodes."""

from __future__ import annotations

from mod_star.errors import InputError


def unicode_text(text: str | bytes, where: str) -> str:
    """`text` as a string that UTF-8 can represent.

    Raises:
        InputError: Bytes that are not UTF-8, or a string with an unpaired surrogate (JSON allows to write one).
    """
    try:
        if isinstance(text, bytes):
            return text.decode()
        text.encode()
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not valid UTF-8 (byte 0x{text[error.start]:02x} at {error.start})") from None
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: character {error.start} is an unpaired surrogate, which no text can hold") from None
    return text
