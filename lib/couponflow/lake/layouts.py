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

#: The wide aggregates beside the sequence, in packed order; float32. Counts, money and days are log1p'd.
WIDE_FEATURES = (
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
