"""ublk: block devices whose reads are answered by this process, through io_uring. No policy."""
