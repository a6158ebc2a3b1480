//! Tables of nodes and networks in, plans out.
