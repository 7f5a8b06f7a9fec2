"""From bytes on disk to batches on a device. Knows nothing of training."""

if __name__ != "fasttht.pipelines":
    raise ImportError(f"import this package as 'fasttht.pipelines', not {__name__!r}; run 'pip install -e .' once")


class DataError(Exception):
    """The data on disk is missing, damaged or not what was asked for. The command line exits with 3."""

    exit_code = 3


class ResourceError(DataError):
    """The machine has no room on the disk, no memory, or no batch in time. The command line exits with 6."""

    exit_code = 6
