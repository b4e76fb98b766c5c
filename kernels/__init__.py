"""Hot operations: one public function an operation, one file a backend, and a plain reference beside them."""
