"""From documents to rows: `concat` lays them end to end and cuts; `best_fit` keeps documents whole
where they fit, by a plan that `packing_index` keeps on disk.
"""
