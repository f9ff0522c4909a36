//! Packs: the unit of wire, disk, fsync and acknowledgement.
