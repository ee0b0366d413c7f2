"""From Open Images to shards: which images, which masks, fetched as little as needed, packed, accounted for."""
