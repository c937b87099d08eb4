"""Indexes: item vectors that can be searched, exactly or nearly, with filters that always hold."""
