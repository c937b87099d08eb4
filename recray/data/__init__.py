"""From a log to arrays: reading, checking, ids, splits, features, histories, batches; a synthetic world."""
