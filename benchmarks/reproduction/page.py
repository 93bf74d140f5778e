def write_page(results, path):
    return f"{len(results.rows)} of {len(results.requests)}"
