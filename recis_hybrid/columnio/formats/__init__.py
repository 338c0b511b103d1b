"""One file for each format of files, all behind the protocol `Format`."""

from .protocol import SUFFIXES as SUFFIXES, Contents as Contents, Format as Format, format_of as format_of
