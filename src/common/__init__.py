"""Everything the notebooks compute: data, networks, Hessians, theory, figures and records."""
