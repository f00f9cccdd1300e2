//! The registry as a node sees it: the folder of signed versions, keys, and the exchange of versions with peers.
