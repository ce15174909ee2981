"""What the packed columns hold: field order, reserved vocabulary indices, the wide features.

Plain Python, so that Spark, which packs, and torch, which unpacks, read the same lines.
"""

#: Fields of one packed history event, in order; int32 little-endian, row-major ``[length, fields]``.
HISTORY_FIELDS = ("item", "category", "shop", "event_type", "age_minutes")
#: Fields of one packed auxiliary negative, aligned with the history; 0 where none could be drawn.
NEGATIVE_FIELDS = ("item", "category")
#: Fields of one packed target member; 0 where a member does not name the field.
TARGET_FIELDS = ("item", "category", "shop")

#: Vocabulary fields and their reserved indices.
VOCABULARY_FIELDS = ("item", "category", "shop", "event_type")
PAD, OOV, FIRST_INDEX = 0, 1, 2

EVENT_TYPES = ("view", "search", "favourite", "cart", "purchase", "mail_open", "mail_click")

#: Days back from ``as_of_date`` that orders, lines, money and browsing are summed over.
WINDOWS = (1, 7, 14, 28, 56, 91)
#: Browsing that is counted per window, and the event types of each count.
BROWSING = {"views": ("view",), "carts": ("cart",), "interests": ("search", "favourite")}
#: Where a user's events meet the target of the campaign: its categories, and the shops of its items.
AFFINITIES = ("category", "shop")

_FIRST_FEATURES = (
    "num_orders_all",
    "num_orders_28_days",
    "num_orders_7_days",
    "num_lines_all",
    "num_lines_28_days",
    "spend_amount_all",
    "spend_amount_28_days",
    "spend_amount_56_days",
    "recency_days",
    "tenure_days",
    "num_categories",
    "num_coupon_lines_all",
    "num_coupon_lines_28_days",
    "num_coupon_lines_91_days",
    "coupon_amount_all",
    "coupon_recency_days",
    "num_coupon_match_lines",
    "discount_amount_all",
    "num_discount_lines",
    "num_promoted_lines_all",
    "num_promoted_lines_56_days",
    "promoted_amount_all",
    "num_promoted_items",
    "num_redemptions",
    "num_redeemed_campaigns",
    "redemption_recency_days",
    "num_campaigns_received",
    "num_campaigns_finished",
    "num_campaign_coupons",
    "num_campaign_items",
    "campaign_days",
    "is_type_a",
    "is_type_b",
    "is_type_c",
    "has_attributes",
)

_PER_WINDOW = ("num_orders", "num_lines", "spend_amount", *(f"num_{name}" for name in BROWSING))

#: The wide aggregates beside the sequence, in packed order; float32. Counts, money and days are log1p'd;
#: shares, rates and flags lie in 0..1 as they are. New ones come last: a bundle names those it knows.
WIDE_FEATURES = (
    *_FIRST_FEATURES,
    *(
        name
        for measure in _PER_WINDOW
        for days in WINDOWS
        if (name := f"{measure}_{days}_days") not in _FIRST_FEATURES
    ),
    "view_recency_days",
    "cart_recency_days",
    "num_active_days_7_days",
    "num_active_days_28_days",
    *(
        f"{prefix}_{affinity}_{what}_{span}"
        for affinity in AFFINITIES
        for span in ("28_days", "all")
        for prefix, what in (
            ("num_target", "events"),
            ("target", "event_share"),
            ("num_target", "lines"),
            ("target", "line_share"),
        )
    ),
    "redemption_rate",
    "num_sends_7_days",
    "num_sends_28_days",
    "num_sends_91_days",
    "send_recency_days",
    "num_opens_28_days",
    "num_opens_91_days",
    "num_clicks_28_days",
    "num_clicks_91_days",
    "open_rate_91_days",
    "click_rate_91_days",
    "num_sends_since_open",
    "num_returned_orders",
    "returned_amount_all",
)
